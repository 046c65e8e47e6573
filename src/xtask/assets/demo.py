"""The demo's sandbox, through the E2B SDK as it is published: create it, use it, leave it alone, see it go.

Run by `cargo xtask demo`, which sets E2B_API_URL and E2B_SANDBOX_URL.
"""

import argparse
import json
import math
import os
import sys
import time
import urllib.request

from e2b import Sandbox

LIVE = sys.stdout.isatty()


def say(text=""):
    print(text, flush=True)


def show(code, result):
    """A line of SDK code and what it returned."""
    say(f"  >>> {code}")
    for line in str(result).rstrip().splitlines():
        say(f"      {line}")


def explain(sandbox_id):
    """hostd's own view of the sandbox. Looking at it never keeps the sandbox alive."""
    url = f"{os.environ['E2B_API_URL']}/sandboxes/{sandbox_id}/idle"
    request = urllib.request.Request(url, headers={"X-API-Key": os.environ["E2B_API_KEY"]})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def seconds(value):
    return "not while in use" if value is None else f"{float(value):.0f} s"


def show_view(view):
    say(f"      state         {view.get('state')}")
    say(f"      idle for      {seconds(view.get('idle_for_s'))}")
    say(f"      released in   {seconds(view.get('releases_in_s'))}")
    holds = view.get("holds") or []
    for hold in holds:
        effect = "keeps it alive" if hold.get("counts") else "does not count"
        say(f"      hold          {hold.get('class')}: {hold.get('origin')} ({effect}, {seconds(hold.get('age_s'))})")
    if not holds:
        say("      holds         none: nobody is using it")


def wait_for_release(sandbox_id, idle):
    """Counts down until hostd has released the sandbox; returns its last view."""
    deadline = time.monotonic() + idle + 30
    shown = None
    while time.monotonic() < deadline:
        view = explain(sandbox_id)
        if view.get("ended"):
            if LIVE:
                print("\r" + " " * 70 + "\r", end="")
            return view
        left = view.get("releases_in_s")
        step = None if left is None else math.ceil(float(left) / (1 if LIVE else 10))
        if step != shown:
            shown = step
            text = f"      idle for {seconds(view.get('idle_for_s'))}, released in {seconds(left)}"
            print(f"\r{text:<70}" if LIVE else text, end="" if LIVE else "\n", flush=True)
        time.sleep(0.5)
    sys.exit(f"the sandbox was not released within {idle + 30} s: {json.dumps(explain(sandbox_id))}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--idle", type=int, required=True)
    idle = parser.parse_args().idle

    say()
    say("1. A sandbox, with the SDK's own code and two environment variables")
    start = time.monotonic()
    sandbox = Sandbox.create(metadata={"idle_timeout": str(idle)})
    took = time.monotonic() - start
    show(f'Sandbox.create(metadata={{"idle_timeout": "{idle}"}})', f"{sandbox.sandbox_id} after {took:.2f} s")

    command = "uname -sr && id -un && python3 -c 'print(6 * 7)'"
    show(f'sandbox.commands.run("{command}").stdout', sandbox.commands.run(command).stdout)
    sandbox.files.write("/home/user/note.txt", "written through the SDK\n")
    show('sandbox.files.read("/home/user/note.txt")', sandbox.files.read("/home/user/note.txt"))

    say()
    say("2. Why it is alive, as hostd explains it while a command runs")
    command = sandbox.commands.run("sleep 3", background=True)
    time.sleep(1)
    show_view(explain(sandbox.sandbox_id))
    command.wait()

    say()
    say(f"3. Left alone: released after {idle} s without use")
    left_at = time.monotonic()
    view = wait_for_release(sandbox.sandbox_id, idle)
    say(f"      released after {time.monotonic() - left_at:.1f} s")
    alive = sandbox.is_running()
    show("sandbox.is_running()", alive)

    say()
    say("4. What stays: when and why it ended")
    ended = view["ended"]
    say(f"      ended at      {ended.get('at')}")
    say(f"      reason        {ended.get('reason')}")
    say(f"      lived         {seconds(ended.get('lived_s'))}, of which idle {seconds(ended.get('idle_for_s'))}")
    for transition in (view.get("transitions") or [])[-6:]:
        say(f"      {transition.get('at')}  {transition.get('what')}")
    say()
    if alive:
        sys.exit("the sandbox still answers")


if __name__ == "__main__":
    main()
