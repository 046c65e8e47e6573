"""Images of Pillow: one that is saved is shown as well, and no program is started to look at one."""

import functools
import os
import sys


def show_what_is_saved(module):
    """Lets `Image.save("path")` display the image, once it is saved."""
    save = module.Image.save

    @functools.wraps(save)
    def save_and_show(self, fp, *arguments, **options):
        result = save(self, fp, *arguments, **options)
        # matplotlib saves its figures this way, and shows them itself.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(fp, (str, bytes, os.PathLike)) and not caller.startswith("matplotlib"):
            try:
                from IPython.display import display

                display(self)
            except Exception:
                pass  # It is saved, which is what was asked for.
        return result

    module.Image.save = save_and_show


def open_no_viewer(module):
    """Lets `Image.show()` display the image: there is no screen for a viewer to open on."""
    viewers = [viewer for viewer in module._viewers if type(viewer).__name__ == "IPythonViewer"]
    module._viewers[:] = viewers
