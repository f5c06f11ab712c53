"""The full-size recipe, as arguments of the training entry; `__main__` joins the files of a run."""
