"""FlexTok: pictures as ordered tokens, and a flow decoder that accepts any prefix of them."""
