# How every IPython kernel of this machine is set up.
c = get_config()  # noqa: F821

c.InteractiveShellApp.extensions = ["guestd_results"]
# Tracebacks are read by programs.
c.InteractiveShell.colors = "NoColor"
# A sandbox's home may be read-only, and nobody reads the history of a kernel.
c.HistoryManager.hist_file = ":memory:"
# No door of the agent asks for completions, and this library is slow to load.
c.Completer.use_jedi = False
