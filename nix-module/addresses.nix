# Addresses, prefixes, durations and openings as the policy writes them, and what NixOS' firewall is made by.
{ lib }:
rec {
  isV6 = lib.hasInfix ":";
  # Before a port.
  bracketed = address: if isV6 address then "[${address}]" else address;
  # As a prefix of its own.
  alone = address: address + (if isV6 address then "/128" else "/32");
  # Without the length.
  address = prefix: builtins.head (lib.splitString "/" prefix);
  # What is open to some who don't come through the mesh: exceptions, and sshd on another address.
  openings =
    policy:
    policy.exception
    ++ lib.optional (isOutside policy.ssh) {
      name = "ssh";
      tcp = [ policy.ssh.port ];
      udp = [ ];
      inherit (policy.ssh) from;
    };
  # An option of its own in newer NixOS, which may differ from nftables.enable.
  firewallBackend =
    networking:
    networking.firewall.backend or (if networking.nftables.enable then "nftables" else "iptables");
  isOutside = ssh: ssh.bind != "mesh" && builtins.isList ssh.from;
  # Of a keepalive; null where there is none.
  seconds =
    text:
    let
      number = builtins.fromJSON (builtins.head (builtins.match "([0-9]+).*" text));
    in
    if text == null || text == "off" then
      null
    else if lib.hasSuffix "m" text then
      60 * number
    else
      number;
}
