"""The zoo: how well plans serve many models; see ``docs/zoo.md``.

usage: python -m scripts.zoo [--list] [--only PATTERN] [--dtype DTYPE] [--engines] [--fresh]
"""
