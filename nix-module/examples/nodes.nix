# The fleet's only list: all else about a node follows from its entry (see fleet.nix, which takes
# subdomain and kuma_url_file from here as well where they are said). The keys are of no real host.
[
  {
    hostname = "virginia";
    region = "us-east-1";
    wg_ip = "10.84.0.2";
    public_key = "4ZgJs9GrzJw8bJvZWhT17fec1pYzW27an2YCZ8HE+Ec=";
  }
  {
    hostname = "ncalifornia";
    region = "us-west-1";
    wg_ip = "10.84.0.3";
    public_key = "YxgvJPHE419y1W7u1sQGU214jKuh/7CaESO/2YHIQHo=";
  }
  {
    hostname = "montreal";
    region = "ca-central-1";
    wg_ip = "10.84.0.4";
    public_key = "zEUKqothcJlT4PE3ZsB40v8E6ZPwyxRwenpIVsl+E0g=";
  }
  {
    hostname = "mexicocity";
    region = "mx-central-1";
    wg_ip = "10.84.0.5";
    public_key = "do0zC7T7oz2quofNIWZtPfUjT5/VpKq+GPKP5Ijd0y4=";
  }
  {
    hostname = "saopaulo";
    region = "sa-east-1";
    wg_ip = "10.84.0.6";
    public_key = "F69AEYcqqbjsfJO3lkzihnZtdF0e0DjfHC1L6X+7SGk=";
  }
  {
    hostname = "london";
    region = "eu-west-2";
    wg_ip = "10.84.0.7";
    public_key = "7ul1DgY/FIg2hoi4YuopLoiRYfHCCTsNAPR8p46ILRU=";
  }
  {
    hostname = "paris";
    region = "eu-west-3";
    wg_ip = "10.84.0.8";
    public_key = "o6ZaGFZaQKhYITT+GDtJmTDWzftFTlZcpxaTmRu143g=";
  }
  {
    hostname = "frankfurt";
    region = "eu-central-1";
    wg_ip = "10.84.0.9";
    public_key = "atTQ2j7xuvni0CVFQVsxkmm1lMNXMPT/Eh55aFBpZR0=";
  }
  {
    hostname = "spain";
    region = "eu-south-2";
    wg_ip = "10.84.0.10";
    public_key = "GX9NPnnZGPPkGXE+93U5ZpTm1Pnx6ioIRfuKfJv7oGk=";
  }
  {
    hostname = "stockholm";
    region = "eu-north-1";
    wg_ip = "10.84.0.11";
    public_key = "hKj20mTDuRHSyXwsTEApPG5qnCuUiEvZd0AA0/6YPAk=";
  }
  {
    hostname = "uae";
    region = "me-central-1";
    wg_ip = "10.84.0.12";
    public_key = "eL5cRg+T04sGhM8U0IAQN8NKwwpJyFzEC4YM/zY5FCg=";
  }
  {
    hostname = "telaviv";
    region = "il-central-1";
    wg_ip = "10.84.0.13";
    public_key = "sNBcqpaQ7UTO81HeJT5ax1nkskPW3IrkM0P91HZFPCc=";
  }
  {
    hostname = "capetown";
    region = "af-south-1";
    wg_ip = "10.84.0.14";
    public_key = "FXBnyYCsD+VLX8aLVKs/8olj7J6QS0DGwzY837T7yWY=";
  }
  {
    hostname = "mumbai";
    region = "ap-south-1";
    wg_ip = "10.84.0.15";
    public_key = "nhOy+ZjMz/+Zp5k/89c2IneIBSgPJSUbhOwuupsemTo=";
  }
  {
    hostname = "singapore";
    region = "ap-southeast-1";
    wg_ip = "10.84.0.16";
    public_key = "5p5GG7XSD55ZpyuDrPlV/MxWmqxx9wcOd/m+6hYzd1s=";
  }
  {
    hostname = "jakarta";
    region = "ap-southeast-3";
    wg_ip = "10.84.0.17";
    public_key = "vfz341AgPC9gw1SAR/V5kzQPI+hhXE43EaFxkX9EN2s=";
  }
  {
    hostname = "malaysia";
    region = "ap-southeast-5";
    wg_ip = "10.84.0.18";
    public_key = "z5J3/03KC8LN0tdKoNEA84NvtBjjTUEEs1CRJIQwZ38=";
  }
  {
    hostname = "sydney";
    region = "ap-southeast-2";
    wg_ip = "10.84.0.19";
    public_key = "SGIEoHrHHTuvBohCsPvJEToiZj/aWv3UbIWWzgr+gjc=";
  }
  {
    hostname = "seoul";
    region = "ap-northeast-2";
    wg_ip = "10.84.0.20";
    public_key = "Tflp4eXfiAe+1n6IQBo6Oy/9+iIigYcOO25mKIER7C4=";
  }
  {
    hostname = "hongkong";
    region = "ap-east-1";
    wg_ip = "10.84.0.21";
    public_key = "9/a5avl/fLjQzGIdopS1L59DUKudV5q4X6FC2KAYxSQ=";
  }
]
