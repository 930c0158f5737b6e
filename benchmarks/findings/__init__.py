"""Do the paper's three findings hold, and where does CPQ stand against what people use?"""
