"""A session on each host, reached as OpenSSH would reach it, with its host key verified."""
