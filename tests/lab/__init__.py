"""Tests between whole machines: network namespaces with real sshd; they need root."""
