"""State spread over processes by DeepSpeed's ZeRO or by FSDP2. Imported only if an accelerator asks for either."""
