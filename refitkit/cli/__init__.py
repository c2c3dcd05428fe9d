"""The command line ``refitkit``: one file a command, each registered through a hook.

Exit codes: 0 done; 1 refused or mismatch; 2 usage; 3 plugin fault; 70 a bug; 130 interrupted.
Results go to stdout, everything else to stderr. Importing this package imports no torch.
"""
