"""qhal: one contract for quantized inference, one implementation per accelerator."""
