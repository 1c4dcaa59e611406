"""Which tokens does a step train on?"""
