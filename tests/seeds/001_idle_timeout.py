# Seed 001 has no Python sample; this is the one of seed 000 with Novita's package.
from novita_sandbox.core import Sandbox
import time

sandbox = Sandbox.create(
    metadata={"idle_timeout": "60"}  # Minimum time is 60s,You can customize it
)
print('Sandbox created', sandbox.sandbox_id)

result = sandbox.commands.run('ls -al')
print('Command result', result)

print('Waiting for 10 seconds...')
time.sleep(90)

is_running = sandbox.is_running()
print('Sandbox is running', is_running)

sandbox.kill()
