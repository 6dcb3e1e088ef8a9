"""What the ranks and hosts of a running job do now, and why it hangs: asked over SSH, explained in a sentence."""
