// One walk through an SDK: SDK=e2b | @e2b/code-interpreter | novita-sandbox | novita-sandbox/code-interpreter
import assert from 'node:assert/strict'

const { Sandbox } = await import(process.env.SDK)

const sandbox = await Sandbox.create({ template: 'base', timeoutMs: 120_000, metadata: { walk: process.env.SDK } })
assert.equal(await sandbox.isRunning(), true)

const done = await sandbox.commands.run('echo out; echo err >&2; id -un')
assert.deepEqual([done.exitCode, done.stdout, done.stderr], [0, 'out\nuser\n', 'err\n'])
await assert.rejects(sandbox.commands.run('exit 3'), (error) => error.exitCode === 3)

const text = 'grüße '.repeat(100_000)
await sandbox.files.write('walk/file.txt', text)
assert.equal(await sandbox.files.read('walk/file.txt'), text)
assert.deepEqual((await sandbox.files.list('walk')).map((entry) => entry.name), ['file.txt'])
assert.equal(await sandbox.files.exists('walk/none'), false)
await assert.rejects(sandbox.files.read('walk/none'))
await sandbox.files.remove('walk')

const sleeper = await sandbox.commands.run('sleep 100', { background: true })
assert.ok((await sandbox.commands.list()).some((process) => process.pid === sleeper.pid))
assert.equal(await sandbox.commands.kill(sleeper.pid), true)
assert.equal(await sandbox.commands.kill(sleeper.pid), false)

const many = await Promise.all([...Array(20).keys()].map((n) => sandbox.commands.run(`echo ${n}`)))
assert.deepEqual(many.map((each) => each.stdout), [...Array(20).keys()].map((n) => `${n}\n`))

const joined = await Sandbox.connect(sandbox.sandboxId)
assert.equal((await joined.commands.run('echo joined')).stdout, 'joined\n')

await sandbox.setTimeout(60_000)
const info = await Sandbox.getInfo(sandbox.sandboxId)
assert.ok(Math.abs(info.endAt.getTime() - Date.now() - 60_000) < 2_000, `ends at ${info.endAt}`)

const found = await Sandbox.list({ query: { metadata: { walk: process.env.SDK } } }).nextItems()
assert.deepEqual(found.map((each) => each.sandboxId), [sandbox.sandboxId])

await assert.rejects(Sandbox.create({ template: 'base', metadata: { idle_timeout: '59' } }), /idle_timeout/)

await sandbox.kill()
assert.equal(await sandbox.isRunning(), false)
assert.equal(await joined.isRunning(), false)
await assert.rejects(sandbox.commands.run('true'))
assert.equal(await Sandbox.kill(sandbox.sandboxId), false)
console.log('walked')
// An SDK may leave the timer of a failed call behind, which would keep the program alive for a minute.
process.exit(0)
