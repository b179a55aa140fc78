"""The demo graph and its stand-in towers."""
