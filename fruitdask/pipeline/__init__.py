"""The stages in their order: a module for each verb of the API, and those that they share.

Verbs: `run`, `explore`, `plan`, `report`, `erase`, `verify`. Shared: what is read first (`inputs`), what there is to do (`preparation`,
`changes`), the stages of a run (`featurize`, `reduce`, `results`), its cost (`budget`, `trial`), the record of processing (`record`), and
what `verify` compares and mends (`check`, `repair`).
"""
