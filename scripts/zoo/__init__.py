"""The zoo: how well plans serve many models, and refits of AOTInductor; see ``docs/zoo.md``.

usage: python -m scripts.zoo [--backend BACKEND] [--list] [--only PATTERN] [--dtype DTYPE]
       [--engines] [--again] [--write] [--fresh]
"""
