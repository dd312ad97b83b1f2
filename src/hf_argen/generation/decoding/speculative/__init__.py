"""Parts of draft-and-verify decodings that several of them share."""
