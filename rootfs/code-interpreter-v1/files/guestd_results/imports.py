"""Doing something to a module once it is imported, without importing it."""

import importlib.util
import sys


def when_imported(name, act):
    """Calls `act(module)` when the module is imported, or now if it is."""
    if name in sys.modules:
        _quietly(act, sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, act))


class _Watch:
    """A finder that finds one module where it would be found anyway, and adds a step to its execution."""

    def __init__(self, name, act):
        self.name = name
        self.act = act
        self.searching = False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return None
        execute = spec.loader.exec_module

        def then_act(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _quietly(self.act, module)

        spec.loader.exec_module = then_act
        return spec


def _quietly(act, module):
    # The import of a library must not fail because of what is added to it.
    try:
        act(module)
    except Exception:
        pass
