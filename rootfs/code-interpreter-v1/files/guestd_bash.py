"""The bash kernel without its waits: `python3 -m guestd_bash -f {connection_file}`.

pexpect sleeps for 50 ms before each line that it sends, so that a program that asks for a password can turn off the
echo first. This shell has none from its start, and 43 such lines are sent before it is ready: 2.8 s.
"""

import pexpect


class Spawn(pexpect.spawn):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.delaybeforesend = None


if __name__ == "__main__":
    pexpect.spawn = Spawn

    from bash_kernel.kernel import BashKernel
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(kernel_class=BashKernel)
