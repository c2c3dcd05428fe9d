"""The command line ``refitkit``: one file per command, each registered through a hook.

Exit codes: 0 success; 1 refused or mismatch; 2 usage error; 3 plugin fault; 4 ``diff --exit-code``
found differences; 70 a bug of refitkit; 130 interrupted; 141 the reader of stdout closed it.
Results go to stdout, everything else to stderr. Importing this package does not import torch, so
modules import it, and packages that import it, inside functions.
"""
