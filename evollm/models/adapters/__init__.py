"""LoRA adapters on a shared base: their configurations, target layers, owners, routing and merging."""
