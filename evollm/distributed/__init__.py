"""Optional engines that spread state over processes: DeepSpeed's ZeRO. Imported when an accelerator asks for one."""
