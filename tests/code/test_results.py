"""The startup module in a Python kernel, spoken to as Jupyter clients do."""

import json
import os
import time

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from harness import kernels


class Kernel:
    """A kernel of one spec, and its answers to a cell."""

    def __init__(self, name, folder, home=None):
        specs = kernels.specs(folder / "kernels", for_others=False)
        specs = KernelSpecManager(kernel_dirs=[str(specs)], ensure_native_kernel=False)
        self.manager = KernelManager(kernel_name=name, kernel_spec_manager=specs, transport="ipc")
        self.manager.ip = str(folder / "k")
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, "HOME": home or str(folder)})
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code) -> list[tuple[str, dict]]:
        """Everything that the kernel says about a cell: kind and content of each message."""
        messages = []

        def note(message):
            json.dumps(message["content"], allow_nan=False)
            messages.append((message["msg_type"], message["content"]))

        # Else a kernel may refuse the cell that comes at once after one that failed.
        self.client.execute_interactive(code, allow_stdin=False, stop_on_error=False, timeout=60, output_hook=note)
        return messages

    def bundles(self, code) -> list[dict]:
        """The MIME bundles of the results and displays of a cell that must not fail."""
        messages = self.run(code)
        assert not [content for kind, content in messages if kind == "error"], messages
        assert not [content for kind, content in messages if content.get("name") == "stderr"], messages
        return [content["data"] for kind, content in messages if kind in ("execute_result", "display_data")]

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    kernel = Kernel("python3", tmp_path_factory.mktemp("k"))
    yield kernel
    kernel.close()


def test_a_kernel_starts_without_a_home_to_write_into(tmp_path):
    kernel = Kernel("python3", tmp_path, home="/proc/nowhere")
    try:
        assert kernel.bundles("1 + 1") == [{"text/plain": "2"}]
    finally:
        kernel.close()


def test_bash_answers_without_the_waits_of_its_terminal(tmp_path):
    kernel = Kernel("bash", tmp_path)
    try:
        start = time.monotonic()
        for number in range(20):
            told = [content["text"] for kind, content in kernel.run(f"echo {number}") if kind == "stream"]
            assert told == [f"{number}\n"]
        # Each of them took 105 ms and more.
        assert time.monotonic() - start < 1.9
        assert [content["evalue"] for kind, content in kernel.run("cd /usr; (exit 3)") if kind == "error"] == ["3"]
        long = "x" * 5000
        told = [content["text"] for kind, content in kernel.run(f"pwd; echo {long} | wc -c") if kind == "stream"]
        assert told == ["/usr\n", "5001\n"]
    finally:
        kernel.close()


def test_nothing_large_is_imported_before_the_user_does(kernel):
    [bundle] = kernel.bundles("import sys; [m for m in ('pandas', 'numpy', 'matplotlib', 'PIL', 'jedi') if m in sys.modules]")
    # jedi is no part of the image, but may be of this environment.
    assert bundle["application/json"] in ([], ["jedi"])


def test_a_table_comes_with_its_data_and_a_plain_value_without(kernel):
    code = "import pandas as pd; pd.DataFrame({'a': [1, 2], 't': pd.to_datetime(['2024-01-01', None])})"
    [bundle] = kernel.bundles(code)
    assert bundle["e2b/data"] == {"a": [1, 2], "t": ["2024-01-01T00:00:00", None]}
    assert "<table" in bundle["text/html"] and "2024-01-01" in bundle["text/plain"]
    [bundle] = kernel.bundles("1 + 1")
    assert bundle == {"text/plain": "2"}


def test_a_figure_is_shown_as_png_with_its_chart(kernel):
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4])\nplt.xlabel('t (s)')\nplt.show()"
    [bundle] = kernel.bundles(code)
    assert bundle["image/png"] and bundle["e2b/chart"]["type"] == "line" and bundle["e2b/chart"]["x_unit"] == "s"
    [bundle] = kernel.bundles("plt.boxplot([1, 2, 9]); None")
    assert bundle["image/png"] and bundle["e2b/chart"]["type"] == "box_and_whisker"


def test_a_blank_figure_has_an_empty_chart(kernel):
    bundles = kernel.bundles("import matplotlib.pyplot as plt\nplt.figure()\nplt.show()")
    assert [bundle["e2b/chart"] for bundle in bundles] == [{}]


def test_a_figure_that_fails_is_shown_all_the_same(kernel):
    code = (
        "import matplotlib.pyplot as plt\nfigure, ax = plt.subplots()\nax.plot([1, 2])\n"
        "ax.get_title = lambda loc=None: 1 / 0\nplt.show()"
    )
    [bundle] = kernel.bundles(code)
    assert bundle["image/png"] and bundle["e2b/chart"] == {}


def test_lists_and_dictionaries_come_as_json(kernel):
    [bundle] = kernel.bundles("import numpy as np; {1: np.arange(2), 'x': float('inf')}")
    assert bundle["application/json"] == {"1": [0, 1], "x": None}
    [bundle] = kernel.bundles("[1, 'a', None]")
    assert bundle["application/json"] == [1, "a", None] and bundle["text/plain"] == "[1, 'a', None]"
    # Not JSON: the text stays.
    [bundle] = kernel.bundles("[object]")
    assert set(bundle) == {"text/plain"}
    [bundle] = kernel.bundles("a = []; a.append(a); a")
    assert bundle == {"text/plain": "[[...]]"}


def test_an_object_says_itself_what_its_data_and_chart_are(kernel):
    code = (
        "class Own:\n    def _repr_e2b_data_(self): return {'a': [1]}\n"
        "    def _repr_e2b_chart_(self): return {'type': 'unknown', 'title': None, 'elements': []}\nOwn()"
    )
    [bundle] = kernel.bundles(code)
    assert bundle["e2b/data"] == {"a": [1]} and bundle["e2b/chart"]["type"] == "unknown"


def test_a_long_list_is_written_out(kernel):
    [bundle] = kernel.bundles("list(range(5000))")
    assert bundle["text/plain"].endswith("4999]") and "..." not in bundle["text/plain"]


def test_a_saved_image_is_shown_and_none_is_given_to_a_viewer(kernel, tmp_path):
    code = f"from PIL import Image, ImageShow\nImage.new('RGB', (2, 2)).save({str(tmp_path / 'a.png')!r})"
    [bundle] = kernel.bundles(code)
    assert bundle["image/png"] and (tmp_path / "a.png").exists()
    # Neither into memory, nor through matplotlib, which shows the figure itself.
    assert kernel.bundles("import io; Image.new('RGB', (2, 2)).save(io.BytesIO(), 'png')") == []
    code = f"import matplotlib.pyplot as plt\nplt.plot([1])\nplt.savefig({str(tmp_path / 'b.png')!r})\nplt.close()"
    assert kernel.bundles(code) == []
    [bundle] = kernel.bundles("Image.new('RGB', (2, 2)).show()")
    assert bundle["image/png"]
    [bundle] = kernel.bundles("[type(viewer).__name__ for viewer in ImageShow._viewers]")
    assert bundle["application/json"] == ["IPythonViewer"]


def test_a_traceback_has_no_colours_and_names_the_error(kernel):
    for code, name in (("undefined_name", "NameError"), ("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError")):
        [error] = [content for kind, content in kernel.run(code) if kind == "error"]
        assert error["ename"] == name and error["traceback"]
        assert "\x1b" not in "".join(error["traceback"])


def test_a_failing_cell_does_not_trouble_the_next_one(kernel):
    kernel.run("class Bad(dict):\n    def items(self): raise RuntimeError('no')\n    def __repr__(self): return 'bad'")
    [bundle] = kernel.bundles("Bad()")
    assert bundle == {"text/plain": "bad"}


def test_history_is_kept_in_memory_and_outputs_can_be_named(kernel):
    [bundle] = kernel.bundles("get_ipython().history_manager.hist_file, get_ipython().history_manager.enabled")
    assert ":memory:" in bundle["text/plain"] or "False" in bundle["text/plain"]
    kernel.run("41")
    [bundle] = kernel.bundles("_ + 1")
    assert bundle["text/plain"] == "42"
