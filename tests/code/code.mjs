// What the code interpreter's SDK shows a JavaScript program. Prints one JSON line for each case: {"case", "value"} or {"case", "error"}.
// Debug mode against E2B_SANDBOX_URL, or SANDBOX_ID of a sandbox to connect to. The expectations are in test_sdk_javascript.py.
const { Sandbox } = await import('@e2b/code-interpreter')
const { SANDBOX_ID } = process.env
const box = await (SANDBOX_ID ? Sandbox.connect(SANDBOX_ID) : Sandbox.create())
const NOBODY = '00000000-0000-4000-8000-000000000000'

const failure = async (action) => {
  try {
    await action()
    return 'nothing was thrown'
  } catch (error) {
    return { name: error.constructor.name, message: error.message }
  }
}
const within = async (action) => {
  const began = Date.now()
  const value = await action()
  return { value, ms: Date.now() - began }
}
const own = async (action, options) => {
  const context = await box.createCodeContext(options)
  try {
    return await action(context)
  } finally {
    await box.removeCodeContext(context).catch(() => {})
  }
}

const cases = {
  'result': async () => {
    const { text, error, results } = await box.runCode('x = 1; x')
    return { text, error: error ?? null, main: results[0].isMainResult }
  },
  'callbacks': () => own(async (context) => {
    const told = []
    const code = "import sys, time\nprint('one', flush=True)\ntime.sleep(0.6)\nprint('two', file=sys.stderr, flush=True)\ndisplay('three')\nraise ValueError('four')"
    const { logs } = await box.runCode(code, {
      context,
      onStdout: (message) => { told.push([message.line, Date.now()]) },
      onStderr: (message) => { told.push([message.line, Date.now()]) },
      onResult: (result) => { told.push([result.text, Date.now()]) },
      onError: (error) => { told.push([error.value, Date.now()]) },
    })
    return { order: told.map(([what]) => what), apart: told[1][1] - told[0][1] > 400, logs }
  }),
  'error': () => own(async (context) => {
    const { error, results } = await box.runCode('missing', { context })
    return { name: error.name, value: error.value, traceback: error.traceback.includes('NameError'), results: results.length }
  }),
  'counts': () => own(async (context) => {
    const counts = []
    for (let n = 0; n < 2; n++) counts.push((await box.runCode('1', { context })).executionCount)
    return counts
  }),
  'state-and-restart': () => own(async (context) => {
    await box.runCode('value = 40', { context })
    const kept = (await box.runCode('value + 2', { context })).text
    await box.restartCodeContext(context)
    return [kept, (await box.runCode('value', { context })).error.name]
  }),
  'contexts': async () => {
    const made = await box.createCodeContext({ cwd: '/tmp', language: 'bash' })
    const newest = (await box.listCodeContexts()).at(-1)
    const where = (await box.runCode('pwd', { context: made })).logs.stdout
    await box.removeCodeContext(made)
    const gone = await failure(() => box.runCode('pwd', { context: made }))
    return { language: made.language, cwd: made.cwd, newest: newest.id === made.id, where, gone: gone.name, said: gone.message.includes(`Context ${made.id} not found`) }
  },
  'unknown-context': async () => [(await failure(() => box.removeCodeContext(NOBODY))).name, (await failure(() => box.restartCodeContext(NOBODY))).name],
  'unknown-language': async () => (await failure(() => box.runCode('1', { language: 'cobol' }))).message.startsWith('500 '),
  'languages': async () => {
    const said = {}
    for (const [language, code] of Object.entries({ python: "print('hi')", js: "console.log('hi')", javascript: "console.log('hi')", ts: "const s: string = 'hi'; console.log(s)", typescript: "console.log('hi')", bash: 'echo hi' }))
      said[language] = (await box.runCode(code, { language })).logs.stdout
    return said
  },
  'variables': () => own(async (context) => {
    const code = "import os; print(os.environ.get('CALL'))"
    return [(await box.runCode(code, { context, envs: { CALL: "it's $5" } })).logs.stdout, (await box.runCode(code, { context })).logs.stdout]
  }),
  'timeout': () => own(async (context) => {
    await box.runCode("kept = 'kept'", { context })
    const thrown = await failure(() => box.runCode('while True: pass', { context, timeoutMs: 1500 }))
    const { value, ms } = await within(() => box.runCode('kept', { context }))
    return { name: thrown.name, kept: value.text, soon: ms < 6000 }
  }),
  'strange-line-ends': () => own(async (context) => (await box.runCode("print('a\\u2028b\\x85c\\x0bd\\x1ce')", { context })).logs.stdout.join('') === 'a\u2028b\x85c\x0bd\x1ce\n'),
  'megabytes': () => own(async (context) => (await box.runCode("print('x' * 3_000_000)", { context })).logs.stdout.join('').length),
  'table': () => own(async (context) => (await box.runCode("import pandas\npandas.DataFrame({'a': [1]})", { context })).results[0].html.includes('<table')),
  'figure': () => own(async (context) => (await box.runCode('import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()', { context })).results[0].png.slice(0, 5)),
  'extra': () => own(async (context) => {
    const [result] = (await box.runCode("display({'application/x-ours': {'a': 1}, 'text/plain': 't'}, raw=True)", { context })).results
    return { text: result.text, extra: result.raw.extra }
  }),
  'kernel-dies': () => own(async (context) => [(await box.runCode('import os; os._exit(1)', { context })).error.name, (await box.runCode('1 + 1', { context })).text]),
  'at-once': async () => (await Promise.all([...Array(12).keys()].map((n) => box.runCode(`'answer ${n}'`)))).map((execution) => execution.text),
  'side-by-side': async () => {
    const contexts = await Promise.all([...Array(3).keys()].map(() => box.createCodeContext()))
    const { value, ms } = await within(() => Promise.all(contexts.map((context, n) => box.runCode(`import time; time.sleep(1.5); '${n}'`, { context }))))
    for (const context of contexts) await box.removeCodeContext(context)
    return { texts: value.map((each) => each.text), soon: ms < 4500 }
  },
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
