// Seed 002, as written.
import { Sandbox } from '@e2b/code-interpreter'

async function main() {
  // Create sandbox with and keep it running for 60 seconds.
  const sandbox = await Sandbox.create({ timeoutMs: 60_000 })

  // Shutdown the sandbox immediately.
  await sandbox.kill()
}

main()
