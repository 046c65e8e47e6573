"""The asynchronous SDK; what is the same code as in the synchronous one is not asked twice."""

import asyncio
import time

import pytest
from e2b import NotFoundException, TimeoutException
from e2b_code_interpreter import AsyncSandbox


@pytest.fixture
def go(interpreter):
    """Runs a coroutine that takes a sandbox and a context of the case's own."""

    def run(body):
        async def whole():
            sandbox = await AsyncSandbox.create(**interpreter.sdk_options)
            own = await sandbox.create_code_context()
            try:
                return await asyncio.wait_for(body(sandbox, own), 90)
            finally:
                await sandbox.remove_code_context(own)

        return asyncio.run(whole())

    return run


def test_callbacks_that_are_coroutines_are_awaited_in_order(go):
    async def body(sandbox, own):
        told = []

        async def tell(message):
            await asyncio.sleep(0.01)
            told.append(getattr(message, "line", None) or getattr(message, "text", None) or message.name)

        code = "import sys\nprint('one', flush=True)\nprint('two', file=sys.stderr, flush=True)\ndisplay('three')\n1/0"
        execution = await sandbox.run_code(code, context=own, on_stdout=tell, on_stderr=tell, on_result=tell, on_error=tell)
        return told, execution.error.value

    assert go(body) == (["one\n", "two\n", "three", "ZeroDivisionError"], "division by zero")


def test_cells_of_several_contexts_run_side_by_side(go):
    async def body(sandbox, own):
        others = [await sandbox.create_code_context() for _ in range(2)]
        began = time.monotonic()
        answers = await asyncio.gather(
            *(sandbox.run_code(f"import time; time.sleep(1.5); '{n}'", context=each) for n, each in enumerate([own, *others]))
        )
        took = time.monotonic() - began
        for each in others:
            await sandbox.remove_code_context(each)
        return [answer.text for answer in answers], took

    answers, took = go(body)
    assert answers == ["0", "1", "2"] and took < 4


def test_cells_of_one_context_wait_for_each_other(go):
    async def body(sandbox, own):
        await sandbox.run_code("n = 0", context=own)
        answers = await asyncio.gather(*(sandbox.run_code("n += 1\nn", context=own) for _ in range(10)))
        return sorted(int(answer.text) for answer in answers), sorted(answer.execution_count for answer in answers)

    assert go(body) == (list(range(1, 11)), list(range(2, 12)))


@pytest.mark.takes(3)
def test_a_task_that_is_cancelled_interrupts_its_cell(go):
    async def body(sandbox, own):
        await sandbox.run_code("kept = 'kept'", context=own)
        begun = asyncio.Event()
        task = asyncio.create_task(
            sandbox.run_code("print('go', flush=True)\nwhile True: pass", context=own, on_stdout=lambda _: begun.set())
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        began = time.monotonic()
        return (await sandbox.run_code("kept", context=own)).text, time.monotonic() - began

    text, took = go(body)
    assert text == "kept" and took < 6


@pytest.mark.takes(3)
def test_a_timeout_is_raised(go):
    async def body(sandbox, own):
        with pytest.raises(TimeoutException, match="Execution timed out"):
            await sandbox.run_code("while True: pass", context=own, timeout=1)
        return (await sandbox.run_code("1 + 1", context=own)).text

    assert go(body) == "2"


def test_contexts_are_made_listed_restarted_and_removed(go):
    async def body(sandbox, own):
        made = await sandbox.create_code_context(language="bash", cwd="/tmp")
        assert (await sandbox.list_code_contexts())[-1].id == made.id
        assert (await sandbox.run_code("pwd", context=made)).logs.stdout == ["/tmp\n"]
        await sandbox.restart_code_context(made)
        assert (await sandbox.run_code("pwd", context=made)).logs.stdout == ["/tmp\n"]
        await sandbox.remove_code_context(made)
        with pytest.raises(NotFoundException):
            await sandbox.run_code("pwd", context=made)

    go(body)


@pytest.mark.parametrize(
    "language, code", [("js", "console.log(40 + 2)"), ("ts", "const n: number = 42; console.log(n)"), ("bash", "echo 42")]
)
def test_other_languages_answer(go, language, code):
    async def body(sandbox, own):
        return "".join((await sandbox.run_code(code, language=language)).logs.stdout)

    assert go(body) == "42\n"


def test_variables_of_a_call_are_there_once(go):
    async def body(sandbox, own):
        code = "import os; print(os.environ.get('CALL'))"
        return [(await sandbox.run_code(code, context=own, envs=envs)).logs.stdout for envs in ({"CALL": "x"}, None)]

    assert go(body) == [["x\n"], ["None\n"]]
