// Seed 002, as written.
import { Sandbox } from '@e2b/code-interpreter'

// Create sandbox with and keep it running for 60 seconds.
// Note: The units are milliseconds.
async function main() {
  const sandbox = await Sandbox.create({
    timeoutMs: 60_000,
  })
  await sandbox.kill()
}

main()
