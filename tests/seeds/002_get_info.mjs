// Seed 002, as written.
import { Sandbox } from '@e2b/code-interpreter'

async function main() {
  // Create sandbox with and keep it running for 60 seconds.
  const sandbox = await Sandbox.create({ timeoutMs: 60_000 })

  // Retrieve sandbox information.
  const info = await sandbox.getInfo()

  console.log(info)

  // {
  //   "sandboxId": "iiny0783cype8gmoawzmx-ce30bc46",
  //   "templateId": "rki5dems9wqfm4r03t7g",
  //   "name": "base",
  //   "metadata": {},
  //   "startedAt": "2025-03-24T15:37:58.076Z",
  //   "endAt": "2025-03-24T15:42:58.076Z"
  // }

  await sandbox.kill()
}

main()
