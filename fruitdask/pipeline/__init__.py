"""The verbs of the API, one module each (`run`, `explore`, `plan`, `report`, `erase`, `verify`), and what they share.

Shared: the checked input (`inputs`), the pending work (`state`, `changes`), the stages of a run (`featurize`, `reduce`,
`results`), its cost (`budget`, `trial`), the record of processing (`record`), and the halves of `verify` (`check`,
`repair`).
"""
