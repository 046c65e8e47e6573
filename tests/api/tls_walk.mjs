// One walk over TLS, by names alone: SDK=e2b | @e2b/code-interpreter | novita-sandbox | novita-sandbox/code-interpreter, SERVERS=<folder>
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'

const { Sandbox } = await import(process.env.SDK)
const runsCode = process.env.SDK.endsWith('code-interpreter')

const sandbox = await Sandbox.create({ template: runsCode ? 'code-interpreter-v1' : 'base', timeoutMs: 300_000 })
assert.equal(await sandbox.isRunning(), true)
assert.equal((await sandbox.commands.run('echo out')).stdout, 'out\n')
const text = 'grüße '.repeat(100_000)
await sandbox.files.write('walk.txt', text)
assert.equal(await sandbox.files.read('walk.txt'), text)
const joined = await Sandbox.connect(sandbox.sandboxId)
assert.equal((await joined.commands.run('echo joined')).stdout, 'joined\n')

async function serve(name, port, path) {
  await sandbox.files.write(`/tmp/${name}`, readFileSync(`${process.env.SERVERS}/${name}`, 'utf8'))
  await sandbox.commands.run(`python3 /tmp/${name} ${port}`, { background: true, timeoutMs: 0 })
  const url = `https://${sandbox.getHost(port)}${path}`
  for (let n = 0; n < 100; n++) {
    const answer = await fetch(url)
    if (answer.ok) return await answer.json()
    assert.equal(answer.status, 502)
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
  assert.fail(`${url} never answered`)
}

const told = await serve('guest_server.py', 8000, '/echo?a=b')
assert.equal(told.path, '/echo?a=b')
assert.equal(told.headers.host, sandbox.getHost(8000))
if (runsCode) {
  // A kernel may have to start first.
  const execution = await sandbox.runCode('x = 7; print(6 * x)', { timeoutMs: 120_000, requestTimeoutMs: 120_000 })
  assert.deepEqual(execution.logs.stdout, ['42\n'])
  assert.equal((await joined.runCode('x')).text, '7')
  assert.equal((await joined.runCode('1 / 0')).error.name, 'ZeroDivisionError')
}

await sandbox.kill()
assert.equal(await sandbox.isRunning(), false)
await assert.rejects(sandbox.commands.run('true'))
if (runsCode) await assert.rejects(sandbox.runCode('1'), (error) => /Timeout|NotFound/.test(error.name))
console.log('walked')
process.exit(0)
