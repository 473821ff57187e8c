# The fleet's only list: all else about a node follows from its entry (see fleet.nix, which takes
# subdomain and kuma_url_file from here as well where they are said). The variables are those that
# `spokeguard fleet render` writes of examples/fleets/vault, and the keys are of no real host.
[
  {
    hostname = "zurich";
    role = "hub";
    region = "zurich";
    wg_ip = "10.84.0.1";
    public_key = "TZHGKScEviRafZbTlNu+q465GJJ7aBsbOgsxQWgeyjU=";
    endpoint = "203.0.113.47:51820";
  }
  {
    hostname = "virginia";
    region = "us-east-1";
    wg_ip = "10.84.0.2";
    public_key = "RB9rDIA0DkrfOBfhGr5FKNMzfstIaNVev0fWAxbiCWA=";
  }
  {
    hostname = "ncalifornia";
    region = "us-west-1";
    wg_ip = "10.84.0.3";
    public_key = "vsOQX3Bg0Tm0iP2whpD6oSyjtskDS5NJTXd/PWiy0E4=";
  }
  {
    hostname = "montreal";
    region = "ca-central-1";
    wg_ip = "10.84.0.4";
    public_key = "tMvgdJ+2KFpeDrpBfD2Cski8MnBaPbQYwzmajscVDUc=";
  }
  {
    hostname = "mexicocity";
    region = "mx-central-1";
    wg_ip = "10.84.0.5";
    public_key = "9rTpc9h5/8PRCowpDE8P0a9sEoatEiKiQJV4tRM2+no=";
  }
  {
    hostname = "saopaulo";
    region = "sa-east-1";
    wg_ip = "10.84.0.6";
    public_key = "/SioE2JaTHL5uye6gjuwHMTXtaOVAhT6yRedv4aXnAg=";
  }
  {
    hostname = "london";
    region = "eu-west-2";
    wg_ip = "10.84.0.7";
    public_key = "Us2q2i+T1NFiY632faKvjxKkX60jAdLeI8n6yEMbkW4=";
  }
  {
    hostname = "paris";
    region = "eu-west-3";
    wg_ip = "10.84.0.8";
    public_key = "4fZQQpBvHfs2ts3pjrjcEGRThV0qLQ/fpIEJK15lv30=";
  }
  {
    hostname = "frankfurt";
    region = "eu-central-1";
    wg_ip = "10.84.0.9";
    public_key = "xOF2/zIGXhpsPSu/xwWT7NaBkHYdTYDGoHvkEKs8c0Y=";
  }
  {
    hostname = "spain";
    region = "eu-south-2";
    wg_ip = "10.84.0.10";
    public_key = "z/zr0nr6dq+KRd3XNrSrcFVc8ChBbamJReXNNJz6bko=";
  }
  {
    hostname = "stockholm";
    region = "eu-north-1";
    wg_ip = "10.84.0.11";
    public_key = "AeMDWNGsjesKTGidh/WJ+faqg1sC3R85TThfFyQjbjA=";
  }
  {
    hostname = "uae";
    region = "me-central-1";
    wg_ip = "10.84.0.12";
    public_key = "JZw6rB4Yh6H9QxWYgxygUu2Q7NA/lVLVdb7guIHoZ3M=";
  }
  {
    hostname = "telaviv";
    region = "il-central-1";
    wg_ip = "10.84.0.13";
    public_key = "looYywQDxplyrB9OBdm5wffMiaYEZbO3sBCSG87UuRU=";
  }
  {
    hostname = "capetown";
    region = "af-south-1";
    wg_ip = "10.84.0.14";
    public_key = "YuhWy7dtLMaXPXflmh5hDvaaNRXfqX44ZGIjkDUJOWQ=";
  }
  {
    hostname = "mumbai";
    region = "ap-south-1";
    wg_ip = "10.84.0.15";
    public_key = "kSf/iO+JLZ29o5jYluV7ZC5BbmxSfsWWk/yVZImj1yg=";
  }
  {
    hostname = "singapore";
    region = "ap-southeast-1";
    wg_ip = "10.84.0.16";
    public_key = "EkBGrtKQaBuQdB5O+e/Ik3e3tYFo63gSj2UHuyVee30=";
  }
  {
    hostname = "jakarta";
    region = "ap-southeast-3";
    wg_ip = "10.84.0.17";
    public_key = "ITrY5ivkrbhImHRnve9xjjCozl915SCwT+lcgzQNv2o=";
  }
  {
    hostname = "malaysia";
    region = "ap-southeast-5";
    wg_ip = "10.84.0.18";
    public_key = "hkrbruVtLdnX592IdnejbraCzs174Bo8HAi6WlYXwlU=";
  }
  {
    hostname = "sydney";
    region = "ap-southeast-2";
    wg_ip = "10.84.0.19";
    public_key = "lIhZ/VQBKAtiMEv3hqrKiqki9ZziCQTnQt/PLdIIezg=";
  }
  {
    hostname = "seoul";
    region = "ap-northeast-2";
    wg_ip = "10.84.0.20";
    public_key = "+8Gf8N93cqpZRht8ijwrAFgggKkbyww+Y6TpFHbcVCw=";
  }
  {
    hostname = "hongkong";
    region = "ap-east-1";
    wg_ip = "10.84.0.21";
    public_key = "xqbu4Pmo8suCr4CVzrNrwzV48fWXSBzr8S0jLKnZ4AQ=";
  }
]
