"""Callbacks of training frameworks, on Graft's verbs.

:mod:`graft.train.lightning` and :mod:`graft.train.transformers` each have an ``ExportCallback``. Importing
them imports neither framework; making a callback does.
"""
