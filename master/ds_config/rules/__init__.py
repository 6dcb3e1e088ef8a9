"""Tables of small rules about DeepSpeed configs, one file a subject; `master/ds_config/checker.py` runs them all."""
