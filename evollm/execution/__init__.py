"""Where a population runs: the verbs of a run (`executor`), agents on one base (`worker`), this process (`local`)."""
