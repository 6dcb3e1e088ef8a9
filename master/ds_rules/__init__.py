"""Tables of small rules about DeepSpeed configs, one file a subject; `master/ds_config.py` runs them all."""
