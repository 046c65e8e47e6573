"""Checks that mostly sleep, asleep at the same time."""

from concurrent.futures import ThreadPoolExecutor


def all_at_once(subtests, checks: list, *arguments) -> None:
    """Runs each check in a thread of its own; each is a subtest of its function's name."""
    with ThreadPoolExecutor(len(checks)) as pool:
        runs = [(check.__name__, pool.submit(check, *arguments)) for check in checks]
    for name, run in runs:
        with subtests.test(name):
            run.result()
