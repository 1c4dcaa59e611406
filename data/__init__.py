"""Which tokens come next?"""
