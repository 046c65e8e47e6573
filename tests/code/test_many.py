"""Many contexts and many cells at once: none is lost, none answers another's question."""

import threading
import time
from pathlib import Path

import pytest

from harness.processes import wait_until

CONTEXTS = 64
CELLS = 16


def kernels_memory(agent) -> list[int]:
    """Resident bytes of each kernel below the agent, private pages only."""
    sizes = []
    for task in Path(f"/proc/{agent.process.pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            total = 0
            for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total = int(line.split()[1]) * 1024
            sizes.append(total)
    return sizes


@pytest.mark.takes(200)
@pytest.mark.timeout(600)
def test_sixty_four_contexts_and_a_thousand_cells_lose_and_swap_nothing(fresh, record_property):
    agent = fresh()
    door = agent.door
    ids: list[str | None] = [None] * CONTEXTS
    began = time.monotonic()

    def create(first: int):
        for n in range(first, CONTEXTS, 4):
            ids[n] = door.create()["id"]

    makers = [threading.Thread(target=create, args=(n,)) for n in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(400)
    assert None not in ids and len(set(ids)) == CONTEXTS
    made_in = time.monotonic() - began
    resting = agent.memory()
    wrong = []

    def client(n: int):
        for turn in range(CELLS):
            cell = door.execute(f"turn = globals().get('turn', -1) + 1\nprint({n}, turn)\n'{n}:' + str(turn)", context_id=ids[n])
            if cell.error or cell.stdout != f"{n} {turn}\n" or cell.text != f"{n}:{turn}" or cell.count != turn + 1:
                wrong.append((n, turn, str(cell)))

    began = time.monotonic()
    clients = [threading.Thread(target=client, args=(n,)) for n in range(CONTEXTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(300)
    ran_in = time.monotonic() - began
    assert not any(thread.is_alive() for thread in clients), "a cell never ended"
    assert wrong == []
    assert [each["id"] for each in door.contexts() if each["id"] in set(ids)] and len(door.contexts()) >= CONTEXTS
    kernels = kernels_memory(agent)
    record_property("contexts_made_s", round(made_in, 1))
    record_property("cells_s", round(ran_in, 1))
    record_property("agent_rss_mb", round(agent.memory() / 1e6, 1))
    record_property("agent_rss_per_context_kb", round(resting / CONTEXTS / 1000))
    record_property("kernel_pss_mb", round(sum(kernels) / max(1, len(kernels)) / 1e6, 1))
    print(
        f"64 contexts in {made_in:.1f} s, 1024 cells in {ran_in:.1f} s, agent {agent.memory() / 1e6:.1f} MB, kernel {sum(kernels) / max(1, len(kernels)) / 1e6:.1f} MB"
    )
    assert agent.memory() < 64_000_000


@pytest.mark.takes(20)
def test_five_hundred_cells_in_one_context_all_answer(door, python):
    answers: dict[int, str] = {}

    def client(first: int):
        for n in range(first, 500, 20):
            answers[n] = door.run(f"'cell {n}'", context_id=python).text

    threads = [threading.Thread(target=client, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert answers == {n: f"cell {n}" for n in range(500)}
    assert door.run("1", context_id=python).count == 501


@pytest.mark.takes(15)
def test_clients_that_come_and_go_in_a_storm_leave_a_context_that_works(door, interpreter, python):
    """Cells that are left at every moment of their life, among cells that must be right."""
    descriptors = interpreter.descriptors()
    wrong = []

    def leaver(n: int):
        for turn in range(6):
            with door.begin("print('go', flush=True)\nimport time; time.sleep(0.05)", context_id=python) as running:
                if (n + turn) % 3:
                    next(iter(running), None)
                running.leave()

    def stayer(n: int):
        for turn in range(6):
            cell = door.execute(f"'{n}:{turn}'", context_id=python)
            if cell.text != f"{n}:{turn}":
                wrong.append(str(cell))

    threads = [threading.Thread(target=target, args=(n,)) for n in range(6) for target in (leaver, stayer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []
    assert door.run("1 + 1", context_id=python).text == "2"
    wait_until(lambda: interpreter.descriptors() <= descriptors + 20, within=10, what="the connections are closed")
