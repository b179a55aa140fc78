"""Tables, images and edges: reading, checking, converting, splitting, sampling, batching."""
