"""An untrusted checkpoint becomes plain tensors: nothing that it asks for is run, and a confined child reads it."""
