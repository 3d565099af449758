"""Archaic words for common English ones, in the manner of the King James Bible."""

from __future__ import annotations

_PAIRS = """
you=thou; your=thy; yours=thine; yourself=thyself; you're=thou art; you 're=thou art; you are=thou art; you've=thou hast; you have=thou hast;
you 'll=thou shalt; you'll=thou shalt; you will=thou wilt; you can=thou canst; are=art; has=hath; does=doth; did=didst; was=wast;
it's='tis; it 's='tis; it is=it be; is=be; is n't=be not; isn't=be not; does n't=doth not; doesn't=doth not; don't=do not; do n't=do not;
did n't=didst not; didn't=didst not; ca n't=cannot; can't=cannot; won't=shall not; wo n't=shall not; will=shall; would=would fain;
could=might; must=needs must; the=ye; this=this very; these=these here; those=yon; that=yon; which=the which; who=he that; and=and eke;
but=yet; because=for that; if=an if; while=whilst; until=till; unless=save; before=ere; between=betwixt;
among=amongst; over=o'er; on=upon; in=within; into=unto; to=unto; with=withal; without=sans; of=o'; from=out of;
about=concerning; below=beneath; near=nigh; against=over against; through=throughout; toward=unto;
towards=unto; often=oft; never=ne'er; ever=e'er; always=evermore; sometimes=at times; now=anon; soon=anon; today=this day;
yesterday=yesterday eve; tomorrow=on the morrow; here=hither; there=yonder; where=whither; why=wherefore; again=once more; perhaps=perchance;
maybe=mayhap; truly=verily; really=forsooth; very=right; quite=passing; enough=enow; nothing=naught; anything=aught; something=somewhat;
everything=all things; everyone=every soul; nobody=no soul; yes=yea; no=nay; not=not at all; more=yet more; much=right much; many=many a;
my=mine; its=his; an=one; a=one; old=olden; said=quoth; told=bade; wrote=writ; spoke=spake; came=did come; got=begat; sat=did sit;
men=goodmen; man=goodman; woman=damsel; women=damsels; girl=maiden; girls=maidens; boy=lad; boys=lads; child=babe; children=babes;
people=folk; friend=kinsman; friends=kinsmen; wife=good wife; husband=lord; film=pageant; movie=pageant; hello=hail; goodbye=fare thee well;
please=prithee; thanks=gramercy; looks=looketh; says=saith; goes=goeth; runs=runneth; sits=sitteth; gets=getteth; puts=putteth;
begins=beginneth; cuts=cutteth; lets=letteth; wins=winneth; hits=hitteth; plans=planneth; stops=stoppeth; tries=trieth; dies=dieth; lies=lieth
"""

# The verbs whose ending alone changes: makes, maketh.
_VERBS = """
adds allows appears asks becomes believes breaks brings builds buys calls carries catches changes claims comes continues covers creates
crosses dances delivers digs drinks drives eats ends enjoys enters explains falls feels fights finds flies follows gives grows helps holds
hopes includes jumps keeps kicks knows lacks leads leans learns leaves likes lives loses loves makes manages means meets moves needs offers
opens owns pays plays proves provides pulls pushes reaches reads remains returns rides rises seeks seems sees sells sends serves shows
sings sleeps smiles speaks spends stands stares starts stays succeeds suffers suggests swings takes talks teaches tells thinks throws
touches turns uses waits walks wants watches wears works writes
"""

LEXICON = dict(pair.split("=") for pair in " ".join(_PAIRS.split()).split("; "))
LEXICON |= {verb: verb.removesuffix("s").removesuffix("e") + "eth" for verb in _VERBS.split()}
