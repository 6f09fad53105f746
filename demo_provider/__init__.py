"""The provider a newcomer meets first: a small app that sells by the call, token and word."""
