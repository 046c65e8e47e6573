await using sandbox = await Sandbox.create();
