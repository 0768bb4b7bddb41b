"""DeepSpeed's ZeRO: optimizer state or the base sharded over processes. Imported only if an accelerator uses it."""
