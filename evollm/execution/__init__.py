"""Executors: their interface (`executor`), live agents on one base (`worker`), and the default executor (`local`)."""
