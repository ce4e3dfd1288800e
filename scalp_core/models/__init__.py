"""The network and how it is trained: architecture, losses, recipe, sampler, optimizer step."""
