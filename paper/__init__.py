"""What re-makes, measures and explains the paper's tables; most modules are commands."""
import signal
import sys

if sys.argv[0] == "-m":                             # python -m paper.X, whose imports take a while
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C during them: no traceback
