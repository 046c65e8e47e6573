// What an SDK shows a JavaScript program. Prints one JSON line for each case: {"case", "value"} or {"case", "error"}.
//
//     SDK=e2b | novita-sandbox   BOX=a folder that is there   SANDBOX_ID=where to connect, else debug mode
//
// The expectations are in test_sdk_javascript.py: this file only looks.
const { Sandbox, ...sdk } = await import(process.env.SDK)
const { BOX, SANDBOX_ID } = process.env
const box = await (SANDBOX_ID ? Sandbox.connect(SANDBOX_ID) : Sandbox.create())

const attempt = async (action) => {
  try {
    return { value: await action() }
  } catch (error) {
    return { name: error.constructor.name, message: error.message, exitCode: error.exitCode, stdout: error.stdout }
  }
}
const name = async (action) => (await attempt(action)).name ?? 'nothing was thrown'
const until = async (condition, what) => {
  for (const end = Date.now() + 8000; !condition(); await new Promise((wake) => setTimeout(wake, 10)))
    if (Date.now() > end) throw new Error(`not in time: ${what}`)
}
const fold = (path) => `${BOX}/${path}`

const cases = {
  'command': async () => {
    const { stdout, stderr, exitCode, error } = await box.commands.run('echo out; echo err >&2; pwd; id -un')
    return { stdout, stderr, exitCode, error: error ?? null }
  },
  'exit-code': () => attempt(() => box.commands.run('echo out; exit 7')),
  'signalled': () => attempt(() => box.commands.run('kill -TERM $$')),
  'environment': async () => (await box.commands.run('echo "$A|$B"', { envs: { A: 'one', B: 'two words' } })).stdout,
  'folder': async () => (await box.commands.run('pwd', { cwd: BOX })).stdout,
  'bad-folder': () => name(() => box.commands.run('true', { cwd: '/no/such/folder' })),
  'unknown-user': () => attempt(() => box.commands.run('true', { user: 'ghost' })),
  'unknown-users-list': () => attempt(() => box.files.list('/', { user: 'ghost' })),
  'other-user': async () => (await box.commands.run('id -un', { user: 'root', cwd: '/' })).stdout,
  'timeout': () => name(() => box.commands.run('sleep 60', { timeoutMs: 700 })),
  'streamed-output': async () => {
    const arrived = []
    await box.commands.run('echo a; sleep 0.5; echo b >&2', { onStdout: (t) => arrived.push([t, Date.now()]), onStderr: (t) => arrived.push([t, Date.now()]) })
    return { texts: arrived.map(([t]) => t), apart: arrived[1][1] - arrived[0][1] > 300 }
  },
  'many-at-once': async () => (await Promise.all([...Array(20).keys()].map((n) => box.commands.run(`echo ${n}`)))).map((d) => d.stdout),
  'stdin': async () => {
    const command = await box.commands.run('cat; echo end', { background: true, stdin: true })
    await box.commands.sendStdin(command.pid, 'grüße ')
    await command.sendStdin('x\n')
    await box.commands.closeStdin(command.pid)
    return (await command.wait()).stdout
  },
  'list-join-kill': async () => {
    const command = await box.commands.run('sleep 60', { background: true, envs: { A: 'b' } })
    const found = (await box.commands.list()).find((each) => each.pid === command.pid)
    const joined = await box.commands.connect(command.pid)
    const killed = [await box.commands.kill(command.pid), await box.commands.kill(command.pid)]
    const ends = [await attempt(() => command.wait()), await attempt(() => joined.wait())]
    return { cmd: found.cmd, args: found.args, envs: found.envs, killed, ends: ends.map((end) => [end.exitCode, end.message]) }
  },
  'join-nobody': () => name(() => box.commands.connect(4000000)),
  'kill-nobody': () => box.commands.kill(4000000),
  'broken-text': async () => (await box.commands.run("head -c 8191 /dev/zero | tr '\\0' a; printf '\\303\\244'")).stdout === 'a'.repeat(8191) + 'ä',
  'megabytes': async () => (await box.commands.run('head -c 5000000 /dev/zero | tr "\\0" x')).stdout.length,
  'terminal': async () => {
    let out = ''
    const terminal = await box.pty.create({ cols: 80, rows: 24, onData: (data) => (out += new TextDecoder().decode(data)), timeoutMs: 20000 })
    await box.pty.resize(terminal.pid, { cols: 100, rows: 40 })
    await box.pty.sendInput(terminal.pid, new TextEncoder().encode('echo [$TERM $(stty size)]; exit 0\n'))
    await terminal.wait()
    return out.includes('[xterm-256color 40 100]')
  },
  'terminal-kill': async () => {
    const terminal = await box.pty.create({ cols: 80, rows: 24, onData: () => {} })
    return [await box.pty.kill(terminal.pid), await box.pty.kill(terminal.pid)]
  },
  'write-read': async () => {
    const written = await box.files.write(fold('new/file.txt'), 'grüße\n')
    const bytes = await box.files.read(fold('new/file.txt'), { format: 'bytes' })
    const chunks = []
    for await (const chunk of await box.files.read(fold('new/file.txt'), { format: 'stream' })) chunks.push(...chunk)
    return { path: written.path, name: written.name, type: written.type, text: await box.files.read(fold('new/file.txt')), bytes: bytes.length, streamed: chunks.length }
  },
  'write-blob-and-buffer': async () => {
    await box.files.write(fold('blob'), new Blob(['blob']))
    await box.files.write(fold('buffer'), new TextEncoder().encode('buffer').buffer)
    return [await box.files.read(fold('blob')), await box.files.read(fold('buffer'))]
  },
  'write-octets-and-gzip': async () => {
    await box.files.write(fold('octets'), 'x'.repeat(100000), { useOctetStream: true })
    await box.files.write(fold('packed'), 'y'.repeat(100000), { gzip: true })
    return [(await box.files.read(fold('octets'))).length, (await box.files.read(fold('packed'), { gzip: true })).length]
  },
  'write-several': async () => {
    const written = await box.files.write([{ path: fold('s/one'), data: '1' }, { path: fold('s/two'), data: '2' }])
    return { paths: written.map((each) => each.path), texts: [await box.files.read(fold('s/one')), await box.files.read(fold('s/two'))] }
  },
  'metadata': async () => {
    await box.files.write(fold('meta'), 'x', { metadata: { kind: 'report' } })
    return (await box.files.getInfo(fold('meta'))).metadata
  },
  'missing': async () => {
    const actions = ['read', 'list', 'getInfo'].map((method) => () => box.files[method]('/no/such/file'))
    actions.push(() => box.files.rename('/no/such/file', fold('x')))
    const names = []
    for (const action of actions) names.push(await name(action))
    return { names, exists: await box.files.exists('/no/such/file') }
  },
  'wrong-kind': async () => {
    await box.files.write(fold('plain'), 'x')
    return [await name(() => box.files.read(BOX)), await name(() => box.files.write(BOX, 'x')), await name(() => box.files.list(fold('plain')))]
  },
  'make-dir': async () => [await box.files.makeDir(fold('m/n')), await box.files.makeDir(fold('m/n'))],
  'info': async () => {
    await box.files.write(fold('info'), '12345')
    const { name, type, path, size, mode, permissions, owner, group } = await box.files.getInfo(fold('info'))
    return { name, type, path, size: Number(size), mode, permissions, owner, group }
  },
  'link': async () => {
    await box.commands.run(`cd ${BOX} && mkdir -p l && echo x > l/target && ln -sfn target l/link`)
    const info = await box.files.getInfo(fold('l/link'))
    return { type: info.type, target: info.symlinkTarget }
  },
  'list': async () => {
    await box.commands.run(`cd ${BOX} && mkdir -p t/subdir1/subdir1_1 t/subdir1/subdir1_2 t/subdir2`)
    return (await box.files.list(fold('t'), { depth: 2 })).map((entry) => entry.path)
  },
  'rename-remove': async () => {
    await box.files.write(fold('r/a'), 'x')
    const moved = await box.files.rename(fold('r/a'), fold('r/deep/b'))
    await box.files.remove(fold('r/deep'))
    return [moved.path, (await box.files.list(fold('r'))).length]
  },
  'watch': async () => {
    await box.files.makeDir(fold('w'))
    const told = []
    const handle = await box.files.watchDir(fold('w'), (event) => { told.push([event.type, event.name]) }, { recursive: true })
    await box.files.makeDir(fold('w/nested'))
    await box.files.write(fold('w/nested/file'), 'x')
    await until(() => told.some(([type, name]) => type === 'write' && name === 'nested/file'), JSON.stringify(told))
    await handle.stop()
    return told[0]
  },
  'watch-entry': async () => {
    await box.files.makeDir(fold('e'))
    const told = []
    const handle = await box.files.watchDir(fold('e'), (event) => { told.push(event) }, { includeEntry: true })
    await box.files.write(fold('e/file'), 'x')
    await until(() => told.some((event) => event.type === 'create'), 'create')
    await handle.stop()
    const { name, path, type } = told.find((event) => event.type === 'create').entry
    return { name, path, type }
  },
  'watch-missing': () => name(() => box.files.watchDir('/no/such/folder', () => {})),
  'running': () => box.isRunning(),
}

const wanted = process.argv.slice(2)
for (const [key, action] of Object.entries(cases)) {
  if (wanted.length && !wanted.includes(key)) continue
  let line
  try {
    line = { case: key, value: (await action()) ?? null }
  } catch (error) {
    line = { case: key, error: `${error?.constructor?.name}: ${error?.message}` }
  }
  console.log(JSON.stringify(line))
}
process.exit(0)
