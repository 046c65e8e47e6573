deno sandbox extend sbx_ord_abc123def456 30m
