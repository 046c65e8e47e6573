const sandbox = await Sandbox.create({ timeout: "5m" });
const id = sandbox.id;
await sandbox.close(); // 进程现在可以退出了

// 稍后
const reconnected = await Sandbox.connect({ id });
