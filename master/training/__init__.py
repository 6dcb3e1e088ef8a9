"""One training: started, supervised, stopped, resumed, and its run folder fetched here."""
